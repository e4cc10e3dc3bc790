"""Which models are trained here? Tensors in, tensors out; no files, no ranks, nothing but torch.

Read in this order:
- given.py, model.py: what every family of models offers: a config that builds the model and accounts for it, the model
  from images to the parameters of a distribution, and a decoder that draws from it;
- likelihood.py: nats and bits per dimension;
- receptive_field.py: what a position sees of the past, measured by gradients;
- decoding.py: drawing images, whatever the family; recompute_decoder.py, the plainest decoder; drawing/: how a value is
  drawn from parameters, and where it goes;
- attention/: pattern.py says which keys each query sees, the one definition that attention and decoding follow;
  local_attention.py computes it at the cost of the pattern;
- image_transformer/: the family of the paper; family.py leads to its parts;
- pixelcnn.py, gated_pixelcnn.py, row_lstm.py, diagonal_bilstm.py: other families, each in one file, of parts in
  masked_convolution.py and lstm_cell.py, drawn by pixel_decoder.py;
- pixelcnnpp.py and pixelsnail.py: PixelCNN++ and PixelSNAIL, of the layers in weight_norm.py;
- linear.py: how matrices are multiplied.
"""
