"""The fine-tuning harness: `deltadiff finetune`, `deltadiff compare` and `make demo`.

`run.py` is one run from settings to result.json, and the best place to start reading. The kinds of
answer that a model can give are in `tasks`, the methods that train it in `methods`, and comparisons
of methods in `compare`. Nothing outside this folder imports it but the command line.
"""
