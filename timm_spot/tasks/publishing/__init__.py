"""Model folders: converting, exporting, and the Hugging Face Hub."""
