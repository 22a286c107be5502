"""What peers_llama_cpp.py is made of: llama.cpp's tools (built, called, read), files for them, and our models beside them."""
