"""Vision-language models, as mlx-vlm defines them.

Loads them so that they run like models of mlx-lm, finds what the images of a row become in its tokens, and computes and
caches the features of images.
"""
