// Package steer has the words in which a node's steering is told who is who, and in
// which it tells what happened, whatever redirects: the packages bpf and netfilter do
// the work, and know nothing of each other. What both have to find out in the same way
// is here as well: which sockets a proxy listens with, and how full their maps are.
package steer
