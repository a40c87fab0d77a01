"""The kinds of answer that a model can give, a file each: a class, a number, text, a span of text.

`base.py` says what a task decides, and `choose.py` has the table of all of them. The rest of the
harness asks the task and never which kind it is.
"""
