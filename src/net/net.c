/* Choosing a back end, and what is the same for all. */
#include <string.h>

#include "base/util.h"
#include "net/net_internal.h"

static void room_on_loop(struct loop_timer *timer)
{
	struct net *net = container_of(timer, struct net, room);

	net->ops->room(net);
}

int net_check(const char *spec, struct error *err)
{
	if (strncmp(spec, "tap=", 4) == 0)
		return net_tap_check(spec + 4, err);
	if (strncmp(spec, "user", 4) == 0 && (spec[4] == ',' || !spec[4]))
		return net_user_check(spec + 4, err);
	return error_set(err, EINVAL, "net \"%s\": give \"user\" or \"tap=NAME\"", spec);
}

int net_open(struct net **out, const char *spec, struct loop *loop, struct error *err)
{
	int ret;

	if (strncmp(spec, "tap=", 4) == 0)
		ret = net_tap_open(out, spec + 4, loop, err);
	else if (strncmp(spec, "user", 4) == 0 && (spec[4] == ',' || !spec[4]))
		ret = net_user_open(out, spec + 4, loop, err);
	else
		return error_set(err, EINVAL, "net \"%s\": give \"user\" or \"tap=NAME\"", spec);
	if (ret < 0)
		return ret;
	for (struct net *queue = *out; queue; queue = queue->next_queue)
		queue->room.function = room_on_loop;
	return 0;
}

void net_close(struct net *net)
{
	while (net) {
		struct net *next = net->next_queue;

		loop_timer_cancel(net->loop, &net->room);
		net->ops->close(net);
		net = next;
	}
}

void net_set_receiver(struct net *net, net_receive_function *receive, void *opaque)
{
	net->receive = receive;
	net->opaque = opaque;
}

void net_send(struct net *net, const uint8_t *frame, size_t length)
{
	size_t header = net->properties.headers ? sizeof(struct net_header) : 0;

	if (length >= header + NET_FRAME_MIN && length <= header + NET_FRAME_MAX)
		net->ops->send(net, frame, length);
}

void net_room(struct net *net)
{
	/* A timer that is due at once, and not loop_post: it can be cancelled when the back end goes. */
	loop_timer_set(net->loop, &net->room, clock_now());
}

const struct net_properties *net_properties(const struct net *net)
{
	return &net->properties;
}

unsigned net_queues(const struct net *net)
{
	unsigned queues = 0;

	for (; net; net = net->next_queue)
		queues++;
	return queues;
}

struct net *net_queue(struct net *net, unsigned index)
{
	while (index--)
		net = net->next_queue;
	return net;
}

void net_use_queues(struct net *net, unsigned queues)
{
	/* Queue 0 is always in use. */
	for (unsigned i = 1; (net = net->next_queue); i++)
		net->ops->use(net, i < queues);
}

void net_set_offloads(struct net *net, struct net_offloads offloads)
{
	if (net->ops->set_offloads)
		net->ops->set_offloads(net, offloads);
}
