"""Weights, shapes and text ends of GGUF files; they are read through the functions for Hugging Face folders."""
