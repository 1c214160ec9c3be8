"""Dictionaries of other libraries: read and written; `bases` converts between their bases exactly.

    saelens         a folder with cfg.json and sae_weights.safetensors
    circuit-tracer  a folder with config.yaml and layer_<i>.safetensors
    sparsify        a folder a hookpoint with cfg.json and sae.safetensors
    authors         the paper's .pt files, read only

A JumpReLU's thresholds are of pre-activations, which no change of basis moves. A trained batch top-k
dictionary is a JumpReLU one, and is written as such. Nothing is ever unpickled with code in it.
"""
