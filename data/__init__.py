"""What goes into an encoder and what comes out: text, checkpoints, runs, scores, exported folders.

Installed, the package is called llm2vec_data, for many projects have a `data` of their own.
"""
