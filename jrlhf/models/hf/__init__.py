"""Reading and writing of Hugging Face folders: configs, tensor names, weights and adapters."""
