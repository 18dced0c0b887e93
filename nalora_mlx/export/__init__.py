"""What other tools read: GGUF for llama.cpp, Ollama and LM Studio. The modules are imported where they are used."""
