"""How does a value come out of the parameters of its distribution?

draw.py draws it, with the noise of keyed_noise.py; canvas.py holds the images that decoders write into.
"""
