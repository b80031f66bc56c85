package dockerapi

// skeinRoutes are what docker has no words for; they sit under one prefix, with and without a version.
func (h *handlers) skeinRoutes() []route {
	return []route{
		{"GET /skein/net/status", h.netStatus},
		{"GET /skein/net/check", h.netCheck},
		{"POST /skein/net/check", h.netCheck},
		{"GET /skein/rebalance", h.rebalance},
		{"POST /skein/rebalance", h.rebalance},
		{"GET /skein/services/{id}/revisions", h.serviceRevisions},
		{"POST /skein/services/{id}/rollback", h.serviceRollback},
		{"POST /skein/join-tokens", h.joinTokenCreate},
		{"GET /skein/join-tokens", h.joinTokenList},
		{"DELETE /skein/join-tokens/{id}", h.joinTokenRemove},
	}
}
