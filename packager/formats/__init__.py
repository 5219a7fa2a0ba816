"""One room for each artifact format: it converts, quantizes and packs what a recipe asks for."""
