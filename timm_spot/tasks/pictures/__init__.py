"""Pictures and data sets, and what is known of a picture: reading, normalising, decoding, saliency maps."""
