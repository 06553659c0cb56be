"""diffalign: make the diffusion model you already use follow your intent better, measured, without forking it."""
