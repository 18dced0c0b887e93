"""What a row means: the forms of rows, their messages, tool calls, images and preferences. Knows no tokenizer."""
