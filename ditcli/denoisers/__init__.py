"""Networks in their runtimes, each a `ditcli.diffusion.denoiser.Denoiser`."""
