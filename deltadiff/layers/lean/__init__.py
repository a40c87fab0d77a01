"""Lean blocks: parts of a model around the swapped layers that keep less for the backward pass.

known_forwards   which modules are gated MLPs and RMSNorms, by the source of their forward pass
lean_forward     what stands in the place of a module's forward pass, and when it steps aside
gated_mlp        the gated MLP, which makes the input of its last layer again
rms_norm         RMSNorm, whose readers make their input again
swap             puts both into a model and takes them out, and says where it did not and why

No module is replaced, and none gets parameters or buffers. Nothing here imports PEFT or Liger.
"""
