"""`deltadiff compare`: the same model, text, seeds and budget for each method.

Each run is a `deltadiff finetune` with one seed. `cases.py` says which runs there are, `runs.py`
makes flat records of what they measured, `report.py` tables and figures of the records, and
`command.py` is the command line.
"""
