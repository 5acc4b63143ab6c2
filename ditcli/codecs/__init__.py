"""Codecs: pictures <-> the model's input, as pixels or through a pretrained autoencoder."""
