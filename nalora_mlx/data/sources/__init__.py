"""Where rows come from: files of every form, folders of texts, and the Hugging Face Hub, read row by row."""
