"""`deltadiff verify`: checks the operations on this machine against float64.

`run.run` checks them, with the rule in `tolerance`; there is one file of cases for each operation.
Other rooms import `run.run`, and `tolerance.Row` and `tolerance.format_table` to show the rows.
"""
