package store

import (
	"cmp"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// A named local volume exists on one node. The first task of a slot that mounts it decides on which; later tasks of the slot go there and
// nowhere else, for on any other node they would find the volume empty.

// LabelVolumeHome on a service, with the value "off", lets its tasks go to nodes where their volumes are empty, as swarm does.
const LabelVolumeHome = "skein.volume.home"

// homeKey names a volume of a slot.
type homeKey struct {
	service string
	slot    uint64
	volume  string
}

func compareHome(a, b homeKey) int {
	return cmp.Or(strings.Compare(a.service, b.service), cmp.Compare(a.slot, b.slot), strings.Compare(a.volume, b.volume))
}

// HomeVolumes lists the volumes of a revision that have a home: named ones of the driver local without options, which may stand for
// storage that all nodes share. Tasks of global services and of jobs have none.
func HomeVolumes(svc *Service, revision uint64) []string {
	if spec := svc.Revs[revision]; spec != nil && svc.Spec.Labels[LabelVolumeHome] != "off" {
		return homeVolumes(spec)
	}
	return nil
}

func homeVolumes(spec *swarm.ServiceSpec) []string {
	if spec.Mode.Global != nil || isJob(spec) || spec.TaskTemplate.ContainerSpec == nil {
		return nil
	}
	var out []string
	for _, m := range spec.TaskTemplate.ContainerSpec.Mounts {
		if m.Type != mount.TypeVolume || m.Source == "" || slices.Contains(out, m.Source) {
			continue
		}
		if o := m.VolumeOptions; o != nil && o.DriverConfig != nil && (len(o.DriverConfig.Options) > 0 || (o.DriverConfig.Name != "" && o.DriverConfig.Name != "local")) {
			continue
		}
		out = append(out, m.Source)
	}
	return out
}

// VolumeHome is the node where a volume of a slot lives, empty if it lives nowhere yet.
func (v view) VolumeHome(service string, slot uint64, volume string) string {
	return v.s.homes.get(homeKey{service, slot, volume})
}

// settle gives the volumes of a slot their home on the node that its task is placed on, or refuses the node when one lives elsewhere.
func (s *state) settle(service string, slot uint64, node string, volumes []string) error {
	if s.services.get(service).Spec.Labels[LabelVolumeHome] == "off" {
		s.forgetHomes(service, slot)
		return nil
	}
	for _, volume := range volumes {
		if home := s.homes.get(homeKey{service, slot, volume}); home != "" && home != node {
			return api.Errorf(errConflict, "volume %s of this task lives on node %s", volume, home)
		}
	}
	for _, volume := range volumes {
		if k := (homeKey{service, slot, volume}); s.homes.get(k) == "" {
			s.homes.put(k, node)
		}
	}
	return nil
}

// forgetHomes lets the volumes of a slot, or of all slots with 0, live nowhere.
func (s *state) forgetHomes(service string, slot uint64) {
	if s.homes.tree.Len() == 0 {
		return
	}
	var gone []homeKey
	s.homes.from(homeKey{service: service, slot: slot}, func(k homeKey, _ string) bool {
		if k.service != service || (slot != 0 && k.slot != slot) {
			return false
		}
		gone = append(gone, k)
		return true
	})
	for _, k := range gone {
		s.homes.del(k)
	}
}
