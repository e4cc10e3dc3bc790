"""What is the Image Transformer (Parmar et al. 2018)?

family.py is what others import. Before it come, in this order: shape.py, the options; pixel_order.py, from images to
sequences; embedding.py and layer.py, the parts that tokens pass; network.py, the forward pass; account.py, its size and
FLOPs; wave_decoder.py, drawing token by token in the blocks of decode_plan.py with the keys that decode_cache.py holds.
"""
