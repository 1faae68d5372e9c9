"""Training an image tokenizer: config.py what, pictures.py from what, step.py how, stage.py in which run."""
