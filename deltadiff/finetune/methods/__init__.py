"""What `--method` names: how a model is prepared for training, and what trains it.

A method is a function of (inputs, settings) that returns a `TrainingSetup`, and a row in
`table.py`, from where the rest of the harness takes it.
"""
