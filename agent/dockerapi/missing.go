package dockerapi

import (
	"net/http"

	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/volume"
)

// unbuilt refuses by name.
func unbuilt(what string) handler {
	return func(http.ResponseWriter, *http.Request) error { return notBuilt("%s is not built yet in Skein", what) }
}

// unsupported refuses for good.
func unsupported(what string) handler {
	return func(http.ResponseWriter, *http.Request) error { return notBuilt("%s are not supported by Skein", what) }
}

// missing answers for an object of a kind of which there is none.
func missing(text string) handler {
	return func(_ http.ResponseWriter, r *http.Request) error { return notFound(text, r.PathValue("id")) }
}

// missingRoutes are docker's operations that Skein knows of and cannot do: lists are empty, the rest is refused by name.
func missingRoutes() []route {
	list := func(v any) handler {
		return func(w http.ResponseWriter, _ *http.Request) error { return writeJSON(w, http.StatusOK, v) }
	}
	routes := []route{
		{"GET /volumes", list(volume.ListResponse{Volumes: []volume.Volume{}, Warnings: []string{}})},
		{"GET /plugins", list([]string{})},
		// Of what there is none, nothing is pruned: docker system prune asks for all kinds.
		{"POST /build/prune", list(build.CachePruneReport{CachesDeleted: []string{}})},
		// docker inspect asks for every kind of object until it finds one of the name.
		{"GET /volumes/{id}", missing("get %s: no such volume")},
		{"GET /plugins/{id}/json", missing("plugin \"%s\" not found")},
		{"/plugins/{rest...}", unsupported("engine plugins")},
		{"/containers/{id}/checkpoints", unsupported("checkpoints")},
		{"/containers/{id}/checkpoints/{rest...}", unsupported("checkpoints")},
		{"GET /containers/{id}/attach/ws", unsupported("attaches over WebSocket")},
	}
	for pattern, what := range map[string]string{
		"/volumes/{rest...}":           "the volumes part of the API",
		"POST /auth":                   "logging in through the daemon",
		"POST /build":                  "building an image",
		"POST /build/{verb}":           "the build cache",
		"POST /session":                "a BuildKit session",
		"POST /grpc":                   "a BuildKit connection",
		"POST /commit":                 "committing a container",
		"GET /images/search":           "searching a registry",
		"GET /containers/{id}/stats":   "container statistics",
		"GET /containers/{id}/changes": "the list of a container's changed files",
		"GET /containers/{id}/export":  "exporting a container",
		"/containers/{id}/archive":     "copying files from and to a container",
		"POST /containers/{id}/update": "updating a container's limits",
	} {
		routes = append(routes, route{pattern, unbuilt(what)})
	}
	return routes
}
