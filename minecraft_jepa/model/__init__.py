"""Networks and losses: encoder, conditioner, predictor, world model, decoders."""
