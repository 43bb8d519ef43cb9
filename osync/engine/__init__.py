"""llama.cpp embedded: bindings, stages, sampling, templates, model store."""
