"""Codecs: pictures <-> the model's input, as pixels or through a pretrained autoencoder."""

from ditcli.codecs.codec import Codec
from ditcli.codecs.folder import open_codec, save_codec
from ditcli.codecs.pixels import PixelCodec

__all__ = ["Codec", "PixelCodec", "open_codec", "save_codec"]
