"""What task files call."""


def with_title(documents):
    return documents.map(lambda document: {"query": "A story: " + document["opening"]})


def count_words(document, results):
    (log_likelihood,) = results
    words = len(document["page"].split())
    size = len(document["page"].encode())
    return {
        "word_perplexity": (log_likelihood, words),
        "byte_perplexity": (log_likelihood, size),
        "bits_per_byte": (log_likelihood, size),
    }
