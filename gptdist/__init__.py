"""gptdist: pretraining of GPT models from raw text, on any layout."""
