"""The input and output of an encoder: text, checkpoints, runs, scores, exported folders.

The installed package is called llm2vec_data, because many projects have a folder `data`.
"""
