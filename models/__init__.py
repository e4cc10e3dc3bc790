"""Which model is trained here? Tensors in, tensors out; no files, no ranks, nothing but torch.

Read in this order:
- image_transformer.py: the config, the model from images to parameters of a distribution, its size and FLOPs;
- pattern.py: which keys each query sees, the one definition that attention and decoding follow;
- pixel_order.py: from images to sequences, and the shift by one that makes the model autoregressive;
- embedding.py, layer.py, linear.py: the parts, in the order in which tokens pass them;
- local_attention.py: attention by the pattern, at the cost of the pattern; local_attention_triton.py and
  local_attention_flex.py compute it on GPUs, from the lists of tiles of tile_plan.py;
- likelihood.py: nats and bits per dimension;
- generate.py: drawing images, position by position, in the blocks of decode_plan.py and with the keys that
  decode_cache.py holds; draw.py draws each value, with the noise of keyed_noise.py.
"""
