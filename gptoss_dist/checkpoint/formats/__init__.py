"""Models of other tools: reading and writing the layouts of transformers and of OpenAI."""
