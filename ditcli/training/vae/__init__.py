"""`ditcli train-vae`: an autoencoder trained as in latent diffusion, with LPIPS and a discriminator."""
