"""Triton kernels, one operation a file: kernel, then launcher. Imported as `deltadiff.kernels`."""

if __name__ != "deltadiff.kernels":
    # A Hugging Face package has the name `kernels`; without this, this folder would hide it.
    raise ImportError("this folder is deltadiff.kernels; install deltadiff and import that")
