"""Text as people keep it, from files to examples.

reading       `read_examples`: finds the file, opens it and gives it to its format
layout        what a user says about a file: its columns, format, delimiter and encoding
formats       the table of all formats
tables, json_rows, dataset_rows    rows from CSV and TSV, from JSON, from what `datasets` reads
rows, conversations                examples from rows
examples, skipped                  what comes out, and what was left out and why

Nothing here knows of models or tokenizers.
"""
