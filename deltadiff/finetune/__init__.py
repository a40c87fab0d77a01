"""The fine-tuning harness: `deltadiff finetune`, `deltadiff compare` and `make demo`.

command, compare/, demo     the commands
run                         one run, from settings to result.json: start reading here
settings, options, presets  what a run depends on, its command line, the papers' values
data/                       text, from files to examples
tasks/, chat, batches       what kind of answer a model gives: encoding, loss, scores
models, quantised, token_checks    loading a model, and whether it can take the text
methods/, training_setup    what `--method` names: how a model is prepared and what trains it
inputs, runner, training    the loop, with checkpoints and memory
metrics, paired_metrics, generation, weight_change    what is measured
report, plots, task_file    what is written

The commands may be imported from outside, and of the rest `models` with `tasks`, to load a model.
"""
