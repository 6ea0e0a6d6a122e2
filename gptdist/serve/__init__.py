"""A small server of OpenAI's protocol, for trying a model."""
