"""A stand-in for a Kubernetes cluster; ``README.md`` says what it fakes, and how faithfully."""
