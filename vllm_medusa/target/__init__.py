"""The target model outside vLLM: sizes, lm_head, tokenizer and template, frozen weights."""
