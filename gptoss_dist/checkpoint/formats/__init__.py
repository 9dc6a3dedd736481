"""Models of other tools: reading and writing the formats of transformers and of OpenAI."""
