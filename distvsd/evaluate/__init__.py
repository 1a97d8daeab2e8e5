"""What particles and priors are worth: labels against the prompt, modes, diversity; read by the shapes classifier."""
