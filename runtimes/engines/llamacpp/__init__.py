"""llama.cpp, through the xllamacpp wheel."""
