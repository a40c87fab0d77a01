"""`deltadiff compare`: the same model, text, seeds and budget for each method.

Each run is a `deltadiff finetune` with one seed.

command                     the command line: start reading here
cases, learning_rates       which runs there are, at which learning rates
runs                        runs them, and makes flat records of what they measured
differences, resampling     paired differences between methods, and their intervals
report                      tables and figures of the records
claims                      what the papers claim, beside the differences
"""
