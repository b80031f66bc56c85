package control

import (
	"fmt"
	"math/rand/v2"

	"skein/manager/store"
)

// Words for services that were given no name.
var (
	nameHow = [...]string{"agile", "brave", "calm", "daring", "eager", "fleet", "gentle", "happy", "jolly", "keen", "lucid", "merry",
		"nimble", "proud", "quick", "quiet", "rapid", "steady", "swift", "vivid", "warm", "wise", "witty", "zesty"}
	nameWho = [...]string{"brant", "crane", "dove", "egret", "falcon", "finch", "gannet", "goose", "heron", "ibis", "jackdaw", "kestrel",
		"lapwing", "linnet", "martin", "osprey", "petrel", "plover", "robin", "starling", "stork", "swallow", "swan", "wren"}
)

// freeName makes up a name no service has.
func freeName(tx store.ReadTx) string {
	for n := 0; ; n++ {
		name := nameHow[rand.IntN(len(nameHow))] + "_" + nameWho[rand.IntN(len(nameWho))]
		if n > 3 {
			name = fmt.Sprintf("%s%d", name, rand.IntN(10*n*n))
		}
		if tx.ServiceByName(name) == nil {
			return name
		}
	}
}
