"""`deltadiff theory`: DiffoRA's theorems 1 and 2 on a small network, measured beside their bounds.

`experiment.py` trains the network of the paper's equation 3 and counts over random draws;
`command.py` prints and draws what it found.
"""
