"""The lab: two one-node Ceph clusters and an OpenSSH server on loopback.

Standard library only: it runs before anything is installed, and the tests import the same code.
Everything it makes lies in one folder (`.lab/` beside the project unless SIPHON_LAB names another).
"""
