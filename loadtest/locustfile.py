"""placeholder"""
from locust import HttpUser, task
class U(HttpUser):
    @task
    def m(self): self.client.get("/v1/models")
