package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

const (
	pemCertificate = "CERTIFICATE"
	pemKey         = "PRIVATE KEY"
	pemKeyEC       = "EC PRIVATE KEY"
	pemKeyRSA      = "RSA PRIVATE KEY"
)

func encodeCertificates(ders [][]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der})...)
	}
	return out
}

func encodeAll(certs []*x509.Certificate) []byte {
	var ders [][]byte
	for _, c := range certs {
		ders = append(ders, c.Raw)
	}
	return encodeCertificates(ders)
}

func parseDER(ders [][]byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// encodeKey is PKCS #8, which Envoy and everybody else reads.
func encodeKey(key crypto.Signer) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		panic("identity: marshal key: " + err.Error()) // only for unknown kinds and curves
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der})
}

// parseCertificates reads 1 to limit PEM certificates and nothing else.
func parseCertificates(data []byte, limit int) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil || block.Type != pemCertificate {
			return nil, errors.New("must be PEM certificates and nothing else")
		}
		if len(certs) == limit {
			return nil, fmt.Errorf("has more than %d certificates", limit)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs), err)
		}
		certs, data = append(certs, c), rest
	}
	if len(certs) == 0 {
		return nil, errors.New("has no certificate")
	}
	return certs, nil
}

// parseKey reads a P-256 key; its errors never quote data.
func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	parsed, err := parseAnyKey(data)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("isn't a P-256 key")
	}
	return key, nil
}

// parseSigner reads a key that an authority may sign with; its errors never quote
// data.
func parseSigner(data []byte) (crypto.Signer, error) {
	parsed, err := parseAnyKey(data)
	if err != nil {
		return nil, err
	}
	return checkSigner(parsed)
}

func parseAnyKey(data []byte) (parsed any, err error) {
	block, rest := pem.Decode(data)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("must be one PEM key")
	}
	switch block.Type {
	case pemKey:
		parsed, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case pemKeyEC:
		parsed, err = x509.ParseECPrivateKey(block.Bytes)
	case pemKeyRSA:
		parsed, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, errors.New("must be a PEM key of type " + pemKey)
	}
	if err != nil {
		return nil, errors.New("isn't a readable private key")
	}
	return parsed, nil
}
