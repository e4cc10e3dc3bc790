"""Who attends to whom (pattern.py), and how is that computed?

local_attention.py chooses: local_attention_triton.py and local_attention_flex.py on GPUs, from the lists of tiles of
tile_plan.py, else block by block. On torch's meta device, attention_on_meta.py says what would be allocated.
"""
