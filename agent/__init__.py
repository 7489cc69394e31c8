"""rbd-siphon: replicates Ceph RBD images between two clusters that share nothing but an SSH port."""

__version__ = "0.1.0"
